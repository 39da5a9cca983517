import { app } from "../../scripts/app.js";

const PREVIEW_HEIGHT = 240;

// Frontends before 1.45 take what a node without a VIDEO input shows for a picture.
function playsVideo(node) {
  node.previewMediaType ??= "video";
}

// Previews of this node move. The canvas would draw their first frame alone, so they go into an element instead.
function playsPreviews(node) {
  let widget;
  Object.defineProperty(node, "imgs", {
    get: () => undefined,
    set(pictures) {
      const picture = pictures?.[0];
      if (!picture) return;
      picture.style.cssText = "width: 100%; height: 100%; object-fit: contain; pointer-events: none";
      widget ??= node.addDOMWidget("sfpp_preview", "img", document.createElement("div"), {
        canvasOnly: true,
        getMinHeight: () => PREVIEW_HEIGHT,
        hideOnZoom: false,
        serialize: false,
      });
      widget.serialize = false;
      widget.element.replaceChildren(picture);
    },
  });
}

const PREPARED = { SFPPDecodeToVideo: playsVideo, SFPPLongSampler: playsPreviews };

app.registerExtension({
  name: "SelfForcingPP.Player",
  nodeCreated(node) {
    PREPARED[node.comfyClass]?.(node);
  },
});
