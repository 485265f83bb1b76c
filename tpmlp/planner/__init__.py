"""What to run, before anything is rented: predictions, and programs compiled for absent devices."""
