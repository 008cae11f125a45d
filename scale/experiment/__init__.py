"""The full experiment: from a config file to a folder of images, records and one table, whatever happens on the way."""
