"""Using a trained model: embeddings, classification and search from a checkpoint alone, without the
training data.
"""
