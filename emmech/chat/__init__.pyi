from emmech.chat.masks import phrase_tokens as phrase_tokens
