// Browsers do not start workers for pages on the disk. Search runs in a hidden frame there instead.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.appendChild(frame);
      const inside = frame.contentWindow;
      const load = (source) => new Promise((resolve) => {
        const script = inside.document.createElement("script");
        script.src = source;
        script.onload = resolve;
        inside.document.body.appendChild(script);
      });
      // What the worker posts is an event of the page; what it imports is loaded script by script.
      inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      inside.importScripts = (...sources) =>
        sources.reduce((before, source) => before.then(() => load(source)), Promise.resolve());
      this.inside = inside;
      this.ready = load(url);
    }
    postMessage(data) {
      this.ready.then(() => this.inside.dispatchEvent(new MessageEvent("message", { data })));
    }
    set onmessage(handler) { this.addEventListener("message", handler); }
    terminate() {}
  };
}
