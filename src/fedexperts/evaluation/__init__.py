"""What a model is worth: scores of examples, exam questions and routing; nothing here knows of federation."""
