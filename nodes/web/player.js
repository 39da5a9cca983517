import { app } from "../../scripts/app.js";

// Frontends before 1.45 take what a node without a VIDEO input shows for a picture.
app.registerExtension({
  name: "SelfForcingPP.Player",
  nodeCreated(node) {
    if (node.comfyClass === "SFPPDecodeToVideo") node.previewMediaType ??= "video";
  },
});
