"""Score models: loss, answers, exam questions and routing, without knowledge of federation."""
