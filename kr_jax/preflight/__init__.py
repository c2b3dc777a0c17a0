"""What a config takes on a TPU slice, by the TPU compiler."""
