"""What runs where: loads, allocation and scaling as pure decisions, and the service that writes them. No torch."""
