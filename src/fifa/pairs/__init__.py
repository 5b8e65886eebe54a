"""READ: any feedback data set becomes one table of preference pairs, without reading pixels."""
