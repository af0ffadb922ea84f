/* Search of pages that lie on the disk. A browser starts no worker for a page of a file, so there
   the worker's script runs in a hidden frame, which receives and posts messages as a worker does. */
if (location.protocol === "file:") {
  class IFrameWorker extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.append(frame);
      this.inner = frame.contentWindow;
      this.inner.postMessage = (data) => this.#tell(this, data);
      const script = this.inner.document.createElement("script");
      script.src = url;
      this.ready = new Promise((done, failed) => {
        script.onload = done;
        script.onerror = failed;
      });
      this.inner.document.body.append(script);
    }

    async postMessage(data) {
      await this.ready;
      this.#tell(this.inner, data);
    }

    #tell(receiver, data) {
      receiver.dispatchEvent(new MessageEvent("message", { data }));
    }
  }
  window.IFrameWorker = IFrameWorker;
  window.Worker = IFrameWorker;
}
