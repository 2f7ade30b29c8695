from emmech.chat.masks import phrase_tokens as phrase_tokens
from emmech.chat.model import Anatomy as Anatomy
