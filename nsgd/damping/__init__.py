"""What is done with the directions: the damped step of any torch optimizer."""
