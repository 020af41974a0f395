"""`arcflow serve`: a pipeline behind HTTP.

settings.py    what the images of a batch share
engine.py      the queue, and the threads that make images in batches; knows no HTTP
images.py      images by a link that expires
metrics.py     what Prometheus reads
requests.py    what a client may ask for, and its errors in OpenAI's shape
edits.py       the same with an image to start from
api.py         the routes
server.py      listening, and ending in order
page.py        the page, by Gradio
page_image.py  its part for an image to start from
choices.py     what it offers, what a user has chosen, and the same read back from a PNG
start_image.py the user's image and mask, in the sizes that are served
"""
