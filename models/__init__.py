"""Small trained models and their data: something real for examples, tests and metrics to run on."""
