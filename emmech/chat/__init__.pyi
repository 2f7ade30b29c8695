from emmech.chat.families import Family as Family
from emmech.chat.masks import phrase_tokens as phrase_tokens
