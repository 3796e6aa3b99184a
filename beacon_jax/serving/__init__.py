"""A server: many ask compressed contexts at the same time, by OpenAI's protocol.

From below: `programs` (what runs on the device), `rows` (what a request is, and a row
of the running batch), `engine` (the loop that they join and leave), `store` (memories
as resources), `reading` (texts become memories), `protocol` and `answers` (JSON in and
out), `app` (routes) and `listen` (the process).
"""
