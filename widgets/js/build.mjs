// Bundles the panel into the Python package; with --tests, the unit tests into build/tests.
import { readFileSync, readdirSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { build } from "esbuild";

const here = dirname(fileURLToPath(import.meta.url));
const at = (...parts) => join(here, ...parts);

// The bundle carries uPlot, so it carries uPlot's licence.
const licence = readFileSync(at("node_modules/uplot/LICENSE"), "utf8").trim();
const banner = `/*! PantheraML run panel. Contains uPlot (https://github.com/leeoniya/uPlot):\n\n${licence}\n*/`;

if (process.argv.includes("--tests")) {
  const tests = at("../../tests/js");
  await build({
    entryPoints: readdirSync(tests)
      .filter((name) => name.endsWith(".test.ts"))
      .map((name) => join(tests, name)),
    outdir: at("build/tests"),
    outExtension: { ".js": ".mjs" },
    bundle: true,
    platform: "node",
    format: "esm",
    target: "node18",
    sourcemap: "inline",
    nodePaths: [at("node_modules")],
    logLevel: "warning",
  });
} else {
  await build({
    entryPoints: [
      { in: at("src/index.ts"), out: "panel" },
      { in: at("src/panel.css"), out: "panel" },
    ],
    outdir: at("../pantheraml_widgets/static"),
    bundle: true,
    format: "esm",
    target: "es2022",
    minify: true,
    charset: "utf8",
    legalComments: "none",
    banner: { js: banner, css: banner },
    logLevel: "info",
  });
}
