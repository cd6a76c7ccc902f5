"""What leaving out a token's lighter experts costs, measured for the rules of a request."""
