"""What is here: cards and partitions, read from KFD, sysfs, amd-smi or an emulation file."""
