"""Loading, composition and strict validation of configurations; knows no option of any room."""
