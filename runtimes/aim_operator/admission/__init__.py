"""InferenceServices that name our runtimes, before they are stored: what they are told is completed, and checked."""
