// The page: photos, the camera and the sliders. The network runs in worker.js.

import {draw} from './drawing.js';

const element = (id) => document.getElementById(id);
const sliders = [element('min_score'), element('max_overlap')];
const video = document.createElement('video');      // the camera's; the page shows its frames
Object.assign(video, {muted: true, playsInline: true});

let picture, objects = [], result = '';     // what is shown
let busy = true;            // the worker has a request that it has not answered; first the network
let next = null;            // what to request then; there is never more than one
let sent = [];              // the sliders' values in the last request
let stream = null;          // of the camera, while it runs

// -------------------------------------------------------------------------------------------------
// The worker
// -------------------------------------------------------------------------------------------------

// A worker that is started from a blob: URL has the page's Content-Security-Policy; one that is
// started from a file has only that of the file's HTTP headers, which most servers do not send.
const source = `import ${JSON.stringify(new URL('worker.js', import.meta.url).href)};`;
const worker = new Worker(URL.createObjectURL(new Blob([source], {type: 'text/javascript'})),
                          {type: 'module'});
worker.onerror = () => showProblem('The network could not be started: this browser is too old, ' +
                                   'or a file of the page is missing.');
worker.onmessage = ({data}) => {
  // Without a network the worker stays busy: nothing is requested.
  if (data.problem && element('controls').disabled) return showProblem(data.problem);
  busy = false;
  if (data.ready) showReady(data);
  else if (!data.problem) showObjects(data);
  else if (!next?.image) showProblem(data.problem);     // else another image was chosen since
  if (next) request({});
  else if (stream && !data.problem) requestFrame();
  else requestChange();
};
worker.postMessage({load: new URL('model.onnx', import.meta.url).href});

// Let the worker detect objects in {image}, or in the last image if there is none. While it is busy
// only the latest request is kept.
function request(change) {
  next = {...next, ...change};
  if (busy) return;
  sent = sliders.map((slider) => Number(slider.value));
  const [minScore, maxOverlap] = sent;
  const isFrame = next.image instanceof ImageBitmap;
  worker.postMessage({...next, minScore, maxOverlap}, isFrame ? [next.image] : []);
  busy = true;
  next = null;
}

// Request the last image again if the sliders were moved since. The camera's next frame has their
// values anyway.
function requestChange() {
  const isMoved = sliders.some((slider, i) => Number(slider.value) !== sent[i]);
  if (isMoved && picture && !stream) request({});
}

// -------------------------------------------------------------------------------------------------
// What is shown
// -------------------------------------------------------------------------------------------------

function showReady({device, names, minScore, maxOverlap}) {
  sliders[0].value = minScore;
  sliders[1].value = maxOverlap;
  showThresholds();
  element('controls').disabled = false;
  element('status').textContent = `Ready. The network runs on ${device}.`;
  const classes = names.slice(1).filter((name) => !name.startsWith('N/A '));  // unused indices
  element('classes').textContent = `Classes that it detects: ${classes.join(', ')}.`;
}

function showProblem(sentence) {
  element('problem').textContent = sentence;
  element('result').textContent = result;   // the image before is still shown
  if (element('controls').disabled) element('status').textContent = '';   // no longer loading
  stopCamera();
}

function showThresholds() {
  for (const slider of sliders) slider.nextElementSibling.value = Number(slider.value).toFixed(2);
}

function showObjects(answer) {
  const {width, height, milliseconds} = answer;
  objects = answer.objects;
  if (answer.picture) {
    picture?.close();
    picture = answer.picture;
  }
  redraw();
  const counts = {};
  for (const {name} of objects) counts[name] = (counts[name] ?? 0) + 1;
  const found = Object.entries(counts).map(([name, n]) => `${n} × ${name}`).join(', ');
  element('picture').ariaLabel = found || 'No objects';
  result = `${found || 'No objects'} in ${width} × ${height} pixels, ` +
           `${Math.round(milliseconds)} ms.`;
  element('result').textContent = result;
  element('objects').replaceChildren(...objects.map(({name, score, box}) => {
    const row = document.createElement('tr');
    const corners = box.map((side, i) => (side * (i % 2 ? height : width)).toFixed(1));
    for (const text of [name, score.toFixed(3), corners.join(', ')]) {
      row.insertCell().textContent = text;
    }
    return row;
  }));
}

function redraw() {
  if (picture) draw(element('picture'), picture, objects);
}

// -------------------------------------------------------------------------------------------------
// Photos
// -------------------------------------------------------------------------------------------------

function openFile(file) {
  // After a start that failed, its message stays: nothing would answer.
  if (!file || (element('controls').disabled && element('problem').textContent)) return;
  stopCamera();
  element('problem').textContent = '';
  element('result').textContent = `Reading ${file.name} ...`;
  request({image: file});
}

element('file').onclick = ({target}) => { target.value = ''; };     // for the same file once more
element('file').onchange = ({target}) => openFile(target.files[0]);

for (const kind of ['dragover', 'dragleave', 'drop']) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();     // the browser would leave the page and show the file
    document.querySelector('main').classList.toggle('dropping', kind === 'dragover');
    if (kind !== 'drop') return;
    const {files} = event.dataTransfer;
    if (files.length === 1) openFile(files[0]);
    else if (!element('controls').disabled) {
      showProblem(files.length ? 'Drop one photo at a time.'
                               : 'Drop a file: this was a link or text.');
    }
  });
}

for (const slider of sliders) {
  slider.oninput = () => {
    showThresholds();
    requestChange();
  };
}
window.onresize = redraw;

// -------------------------------------------------------------------------------------------------
// The camera
// -------------------------------------------------------------------------------------------------

const CAMERA_PROBLEMS = {
  NotAllowedError: 'The camera was refused: allow it for this page beside the address, and start ' +
                   'it again.',
  NotFoundError: 'No camera was found: connect one, or choose a photo.',
};

async function startCamera() {
  element('problem').textContent = '';
  if (!navigator.mediaDevices) {
    return showProblem('Browsers give the camera only to pages from https:// or 127.0.0.1.');
  }
  // While the browser waits for permission. A button that is disabled loses the keyboard's focus.
  element('camera').ariaDisabled = 'true';
  try {
    stream = await navigator.mediaDevices.getUserMedia({video: {facingMode: 'environment'}});
    video.srcObject = stream;
    await video.play().catch((error) => {
      if (stream) throw error;  // else a photo was chosen meanwhile, which stops the camera
    });
  } catch (error) {
    showProblem(CAMERA_PROBLEMS[error.name] ??
                `The camera cannot be used: ${error.message}. Does another program use it?`);
  }
  element('camera').ariaDisabled = 'false';
  if (!stream) return;
  stream.getTracks()[0].onended = () => showProblem('The camera was disconnected.');
  element('camera').textContent = 'Stop camera';
  element('take').disabled = false;
  element('result').ariaLive = 'off';   // a screen reader would read a sentence per frame
  requestFrame();
}

function stopCamera() {
  for (const track of stream?.getTracks() ?? []) track.stop();
  stream = video.srcObject = null;
  element('camera').textContent = 'Start camera';
  element('take').disabled = true;
  element('result').ariaLive = 'polite';
  requestChange();
}

// Request the camera's next frame. It is called when the frame before was answered: frames that
// arrive meanwhile are skipped, not queued.
function requestFrame() {
  video.requestVideoFrameCallback(async () => {
    if (!stream || busy) return;
    const image = await createImageBitmap(video);
    if (stream) request({image});
  });
}

element('camera').onclick = ({target}) => {
  if (target.ariaDisabled === 'true') return;
  if (stream) stopCamera();
  else startCamera();
};
element('take').onclick = async () => {
  const image = await createImageBitmap(video);
  element('camera').focus();    // this button is disabled next
  stopCamera();
  request({image});
};
