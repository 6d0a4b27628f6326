"""Language models that judge: guard models (`safety`), and any model over a policy's own rules (`compliance`)."""
