"""`fcvgg bench`: a network beside what a user could pick instead."""
