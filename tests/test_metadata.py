"""minw.packed.metadata: what the metadata of packed networks may hold."""

import json
import re
import tracemalloc
import zlib

import hypothesis
from hypothesis import strategies as st
import pytest

from minw import config as config_lib
from minw import infer
from minw import packed
from minw.packed import metadata

LABELS = ["one", "zwei", "三"]


@pytest.mark.parametrize("found", [
    {}, {"labels": None}, {"labels": []}, {"labels": LABELS},
    {"labels": ["", " ", "a" * 1000]},
    {"config": None}, {"config": {}}, {"config": {"dataset": "digits", "momentum": 1}},
    {"config": {"bits_rules": [["conv1", "bfloat16"]], "input_bits": "float16"}},
    {"config": {"data_dir": "~/data", "data_workers": 8, "init_from": "runs/a"}},
    {"config": {"a field of tomorrow": {"a": [None]}}},
    {"step": 0, "config_hash": "0123456789abcdef" * 4}, {"step": 2**63 - 1},
    {"mine": [1, -2.5, True, None, "a\nb\u001b", {"": []}], "n": -10**90}])
def test_what_may_be_there(found):
  data = json.dumps(found, separators=(",", ":")).encode()
  assert metadata.decode(data, 3) == found
  assert metadata.decode(json.dumps(found, ensure_ascii=False).encode(), 3) == found
  assert metadata.encode(found, 3) == data


STEP = "an integer from 0 to 9223372036854775807"
LABEL = "a printable string of at most 1000 characters"


@pytest.mark.parametrize("data, said", [
    ("[1]", "metadata=[1]: must be a JSON object"),
    ("", "metadata=b'': must be JSON"),
    ("{", "metadata=b'{': must be JSON"),
    ('{"a":1,}', "must be JSON"),
    ('{"labels":5}', "metadata.labels=5: must be null or a list of strings"),
    ('{"labels":false}', "metadata.labels=False: must be null or a list of strings"),
    ('{"labels":"abc"}', "metadata.labels='abc': must be null or a list of strings"),
    ('{"labels":{"a":1}}', "metadata.labels={'a': 1}: must be null or a list"),
    ('{"labels":["a","b"]}', "metadata.labels=['a', 'b']: must be one for each class;"
                             " there are 2 labels for 3 classes"),
    ('{"labels":["a","b",3]}', f"metadata.labels[2]=3: must be {LABEL}"),
    ('{"labels":["a",null,"c"]}', f"metadata.labels[1]=None: must be {LABEL}"),
    ('{"labels":["a",["b"],"c"]}', f"metadata.labels[1]=['b']: must be {LABEL}"),
    ('{"labels":["a\\n","b","c"]}', rf"metadata.labels[0]='a\n': must be {LABEL}"),
    ('{"labels":["a","b\\tc","c"]}', rf"metadata.labels[1]='b\tc': must be {LABEL}"),
    ('{"labels":["\\u001b[2J","b","c"]}', r"metadata.labels[0]='\x1b[2J': must be"),
    ('{"labels":["a\\u0000","b","c"]}', r"metadata.labels[0]='a\x00': must be"),
    ('{"labels":["\\u202egnp","b","c"]}', r"metadata.labels[0]='\u202egnp': must be"),
    ('{"labels":["\\ud800","b","c"]}',
     r"metadata.labels='\ud800': must be text without"),
    (f'{{"labels":["{"a" * 1001}","b","c"]}}', "metadata.labels[0]='aaaaaaaa"),
    ('{"config":[1]}', "metadata.config=[1]: must be null or an object"),
    ('{"config":"x"}', "metadata.config='x': must be null or an object"),
    ('{"config":{"dataset":["digits"]}}',
     "metadata.config.dataset=['digits']: must be of type str"),
    ('{"config":{"data_dir":5}}', "metadata.config.data_dir=5: must be of type str"),
    ('{"config":{"data_workers":"8"}}',
     "metadata.config.data_workers='8': must be of type int"),
    ('{"config":{"eval_resize":true}}',
     "metadata.config.eval_resize=True: must be of type int"),
    ('{"config":{"eval_resize":256.0}}',
     "metadata.config.eval_resize=256.0: must be of"),
    ('{"config":{"random_flip":1}}',
     "metadata.config.random_flip=1: must be of type bool"),
    ('{"config":{"momentum":"0.9"}}',
     "metadata.config.momentum='0.9': must be a number"),
    ('{"config":{"conv_widths":64}}', "metadata.config.conv_widths=64: must be a list"),
    ('{"config":{"conv_widths":[{}]}}',
     "metadata.config.conv_widths=[{}]: must be a list"),
    ('{"config":{"bits_rules":[[[]]]}}',
     "metadata.config.bits_rules=[[[]]]: must be a"),
    ('{"config":{"input_bits":[1]}}',
     "metadata.config.input_bits=[1]: must be an integer or a string"),
    ('{"config":{"seed":null}}', "metadata.config.seed=None: must be of type int"),
    ('{"config":{"momentum":NaN}}', "metadata.config.momentum=nan: must be a finite"),
    ('{"step":-1}', f"metadata.step=-1: must be {STEP}"),
    ('{"step":1.0}', f"metadata.step=1.0: must be {STEP}"),
    ('{"step":true}', f"metadata.step=True: must be {STEP}"),
    ('{"step":null}', f"metadata.step=None: must be {STEP}"),
    ('{"step":"*/ int x; /*"}', f"metadata.step='*/ int x; /*': must be {STEP}"),
    ('{"step":9223372036854775808}',
     f"metadata.step=9223372036854775808: must be {STEP}"),
    ('{"step":Infinity}', "metadata.step=inf: must be a finite number"),
    ('{"config_hash":{"a":"*/"}}',
     "metadata.config_hash={'a': '*/'}: must be 1 to 128"),
    ('{"config_hash":"XYZ"}', "metadata.config_hash='XYZ': must be 1 to 128 hex"),
    ('{"config_hash":"12\\n"}', r"metadata.config_hash='12\n': must be 1 to 128 hex"),
    ('{"x":[-Infinity]}', "metadata.x=-inf: must be a finite number"),
    ('{"x":{"y":1e999}}', "metadata.x.y=inf: must be a finite number"),
    (f'{{"x":{"9" * 101}}}',
     "metadata.x=inf: must be a finite number, and an integer has"),
    (f'{{"x":{"9" * 10**6}}}', "metadata.x=inf: must be a finite number"),
    ('{"x":1,"x":2}', "metadata='x': must be a name that occurs once in its object"),
    ('{"x":{"\\u0079":1,"y":1}}', "metadata='y': must be a name that occurs once"),
    ('{"\\ud800":1}', r"metadata='\ud800': must be text without lone surrogates"),
    ('{"x":["\\udfff"]}',
     r"metadata.x='\udfff': must be text without lone surrogates"),
    ('{"\\u001b[31m\\n":NaN}', r"metadata.\x1b[31m\n=nan: must be a finite number"),
    ('{"x":' + 16 * "[" + 16 * "]" + "}", "must be nested at most 16 deep"),
    ('{"x":' + 10**5 * "[" + 10**5 * "]" + "}", "must be nested at most 16 deep"),
    (10**5 * '{"x":' + "1" + 10**5 * "}", "must be nested at most 16 deep"),
    (" " * (2**22 + 1), "must be at most 4194304 bytes"),
    ("{}".encode("utf-16"), "must be UTF-8"),
    ("{}".encode("utf-16-le"), "must be JSON"),
    (b"\xef\xbb\xbf{}", "must be JSON"),
    (b'{"x":"\xff"}', "must be UTF-8"),
    (b'{"x":"\xed\xa0\x80"}', "must be UTF-8"),  # A lone surrogate, as CESU-8 has it.
], ids=lambda value: repr(value[:40]))
def test_what_is_refused(data, said):
  data = data if isinstance(data, bytes) else data.encode()
  with pytest.raises(ValueError, match=re.escape(said)) as caught:
    metadata.decode(data, 3)
  message = str(caught.value)
  assert message.startswith("packed network: metadata") and len(message) < 400
  assert message.isprintable()  # It cannot forge lines, nor move a cursor.


@pytest.mark.parametrize("found, said", [
    ({"x": {1, 2}}, "metadata={'x': {1, 2}}: must be JSON"),
    ({"x": b"y"}, "metadata={'x': b'y'}: must be JSON"),
    ({"x": float("nan")}, "must be JSON"),
    ({1: 2, "1": 3}, "metadata='1': must be a name that occurs once"),
    ({"x": 10**200}, "metadata.x=inf"),
    ({"x": 10**5000}, "must be JSON"),
    ({"labels": ("a", "b")}, "2 labels for 3 classes"),
    ({"labels": ("a", "b", "c\n")}, r"metadata.labels[2]='c\n'"),
    ([], "metadata=[]: must be a JSON object")])
def test_nothing_is_written_that_would_not_be_read(found, said):
  with pytest.raises(ValueError, match=re.escape(said)):
    metadata.encode(found, 3)


def test_a_file_is_held_to_it():
  program = infer.load("digits_convnet", backend="reference").program
  for change in ({"labels": ["a"]}, {"config": 7}, {"step": "x"}):
    with pytest.raises(ValueError, match="metadata"):
      packed.to_bytes(program._replace(metadata=change))
  data = packed.to_bytes(program._replace(metadata={"labels": [*"0123456789"]}))
  swapped = data.replace(b'"9"', b'901')
  swapped = swapped[:12] + zlib.crc32(swapped[16:]).to_bytes(4, "little") + swapped[16:]
  with pytest.raises(ValueError, match=r"metadata.labels\[9\]=901"):
    packed.from_bytes(swapped)


@pytest.mark.parametrize("piece", ["[],", '"ab",', '{"a":1},'])
def test_memory_is_bounded(piece):
  """By 30 times the largest size; tracing all of that would take long."""
  many = metadata.MAX_BYTES // 16 // len(piece)
  data = ('{"x":[' + piece * many)[:-1].encode() + b"]}"
  tracemalloc.start()
  try:
    assert len(metadata.decode(data, 3)["x"]) == many
    assert tracemalloc.get_traced_memory()[1] < 40 * len(data)
  finally:
    tracemalloc.stop()


def test_long_names_of_many_fields():
  """Takes less than a second; with whole names it would copy terabytes."""
  fields = ",".join(f'"{i}":0' for i in range(100_000))
  metadata.decode(f'{{"{"n" * 2_000_000}":{{{fields}}}}}'.encode(), 3)


def test_every_field_of_a_config_passes():
  config = json.loads(config_lib.to_json(config_lib.default_config()))
  metadata.encode({"config": config}, 3)
  shared = metadata.shared(config)
  assert config.keys() - shared.keys() == {"cache_dir", "data_dir", "data_workers",
                                           "init_from", "teacher"}
  for name, value in config.items():  # And none of them with another type.
    with pytest.raises(ValueError, match=rf"metadata\.config\.{name}="):
      metadata.encode({"config": {name: {"a": value}}}, 3)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
VALUES = SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(
    st.sampled_from(("dataset", "momentum", "")), SCALARS)
FOUND = st.dictionaries(
    st.sampled_from(("labels", "config", "step", "config_hash", "x")), VALUES)


@hypothesis.given(FOUND)
@hypothesis.settings(max_examples=100)
def test_what_is_written_is_read(found):
  try:
    data = metadata.encode(found, 3)
  except ValueError as error:
    assert str(error).isprintable()
    return
  assert metadata.decode(data, 3) == found


@hypothesis.given(FOUND, st.lists(st.tuples(
    st.floats(0, 1), st.integers(0, 2), st.binary(max_size=3)), max_size=4))
@hypothesis.settings(max_examples=100)
def test_damaged_bytes_are_refused_or_follow_the_schema(found, changes):
  data = json.dumps(found).encode()
  for place, left_out, added in changes:
    at = int(place * len(data))
    data = data[:at] + added + data[at + left_out:]
  try:
    read = metadata.decode(data, 3)
  except ValueError as error:
    assert str(error).isprintable()
    return
  assert metadata.decode(metadata.encode(read, 3), 3) == read
