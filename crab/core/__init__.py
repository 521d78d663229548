"""What every room uses: files that are whole or not there, digests of data and of code, and worker processes.

Nothing here knows what the project is about. A newcomer changes nothing in here.
"""
