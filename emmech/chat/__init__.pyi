from emmech.chat.encode import phrase_tokens as phrase_tokens
from emmech.chat.families import Family as Family
