import { app } from "../../scripts/app.js";

app.registerExtension({
  name: "SelfForcingPP.Player",
  nodeCreated(node) {
    // Frontends before 1.45 take what a node without a VIDEO input shows for a picture.
    if (node.comfyClass === "SFPPDecodeToVideo") node.previewMediaType ??= "video";
    // Its previews move; the canvas would draw the first frame alone.
    if (node.comfyClass === "SFPPLongSampler")
      Object.defineProperty(node, "animatedImages", { get: () => true, set() {} });
  },
});
