from emmech.chat.encode import phrase_tokens as phrase_tokens
