"""What two or more ops share unchanged: shape checks and the loader of the C++ library."""
