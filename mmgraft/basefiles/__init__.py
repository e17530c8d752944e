"""The files of a base, read without ever loading the base."""

from mmgraft.basefiles.files import ModelFiles as ModelFiles
from mmgraft.basefiles.files import copy_tokenizer as copy_tokenizer
from mmgraft.basefiles.files import fetch as fetch
from mmgraft.basefiles.files import find_tokenizer as find_tokenizer
from mmgraft.basefiles.files import load_config as load_config
from mmgraft.basefiles.files import resolve as resolve
from mmgraft.basefiles.fingerprint import compare_fingerprints as compare_fingerprints
from mmgraft.basefiles.fingerprint import fingerprint as fingerprint
from mmgraft.basefiles.parts import examine_files as examine_files
from mmgraft.basefiles.parts import read_layers as read_layers
from mmgraft.basefiles.parts import read_modules as read_modules
from mmgraft.basefiles.tensors import TensorReader as TensorReader
from mmgraft.basefiles.whole import load_whole as load_whole
