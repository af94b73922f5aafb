"""What is to be done: from a sweep file to models, servers, cells and what is still owed."""
