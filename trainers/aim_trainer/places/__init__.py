"""Directories, S3 and HTTP behind one door: what is read and written there is whole or not there."""
