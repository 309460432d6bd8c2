"""Data sets of tar files in the format of webdataset."""
