// Read what the page needs of an ONNX file, which is a protobuf message (onnx.proto in ONNX).

const text = (bytes) => new TextDecoder().decode(bytes);

// Yield the fields of a message as {number, tagAt, value}: numbers for the wire type varint, byte
// arrays (views, no copies) for nested messages and strings.
function* fields(bytes) {
  let at = 0;
  const varint = () => {
    let value = 0, factor = 1, byte;
    do {
      byte = bytes[at++];
      value += (byte & 127) * factor;   // not <<, which is limited to 32 bits
      factor *= 128;
    } while (byte & 128);
    return value;
  };
  while (at < bytes.length) {
    const tagAt = at, tag = varint(), number = tag >> 3, wireType = tag & 7;
    if (wireType === 0) {
      yield {number, tagAt, value: varint()};
    } else {
      const length = wireType === 2 ? varint() : {1: 8, 5: 4}[wireType];
      if (!(at + length <= bytes.length)) throw new Error('not an ONNX file, or cut off');
      yield {number, tagAt, value: bytes.subarray(at, at += length)};
    }
  }
}

const find = (bytes, number) => [...fields(bytes)].filter((field) => field.number === number);

// Return the metadata of a model as {key: string}: ModelProto.metadata_props.
export function readMetadata(model) {
  return Object.fromEntries(find(model, 14).map(({value: entry}) => (
    [text(find(entry, 1)[0].value), text(find(entry, 2)[0].value)])));
}

// Remove the defaults of these inputs, in place. A default is an initializer of the input's name,
// and onnxruntime-web has no way to pass a value for an input that has one. The tag of an
// initializer (field 5 of the graph, which is field 7) becomes that of field 9, which ONNX does not
// use and readers skip.
export function removeDefaults(model, names) {
  const graph = find(model, 7)[0].value;
  for (const {tagAt, value} of find(graph, 5)) {
    const name = find(value, 8)[0];
    if (name && names.includes(text(name.value))) graph[tagAt] = (9 << 3) | 2;
  }
}
