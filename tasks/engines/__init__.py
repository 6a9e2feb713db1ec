"""Engines that run a checkpoint: a server behind the OpenAI HTTP API, llama.cpp in this process."""
