"""Data sets whose samples have an index: CSV files, folders of labelled images, generated pairs."""
