"""A trained model behind the HTTP protocol of the OpenAI clients: requests and answers, the engine that draws tokens, the routes."""
