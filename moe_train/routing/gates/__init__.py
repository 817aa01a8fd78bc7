"""One file per gate. Importing this package registers them."""
