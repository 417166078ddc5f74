"""What works around a UNet, the teacher's and students' of every kind: checks for the matrix and for the tests."""
