"""`retro serve`: a model and its datastores over HTTP, with the OpenAI routes and a page for people.

rows.py        one row of a batch: tokens in, text, sources and an end out
engine.py      the queue and the one thread that owns the model
requests.py    what a request may say, and its rows
responses.py   rows to OpenAI's JSON and server-sent events
app.py         routes, errors, the bearer token, headers
server.py      opens model and stores, listens
static/        the page; it loads nothing from elsewhere
"""
