/**
 * Light or dark, as the front end around the panel has it.
 *
 * Asked in this order: JupyterLab and Notebook, Colab, VS Code; elsewhere what the browser prefers.
 */

export type Theme = "light" | "dark";

const dark = "(prefers-color-scheme: dark)";

export function currentTheme(): Theme {
  const { body, documentElement: html } = document;
  const jupyter = body.dataset["jpThemeLight"];
  if (jupyter !== undefined) return jupyter === "true" ? "light" : "dark";
  const colab = html.getAttribute("theme");
  if (colab !== null) return colab === "dark" ? "dark" : "light";
  const vscode = body.dataset["vscodeThemeKind"];
  if (vscode !== undefined) return /light/.test(vscode) ? "light" : "dark";
  return matchMedia(dark).matches ? "dark" : "light";
}

/** Calls back whenever the answer may have changed, until the signal is aborted. */
export function watchTheme(changed: () => void, signal: AbortSignal): void {
  const observer = new MutationObserver(changed);
  const attributeFilter = ["data-jp-theme-light", "data-jp-theme-name", "data-vscode-theme-kind"];
  observer.observe(document.body, { attributes: true, attributeFilter });
  observer.observe(document.documentElement, { attributes: true, attributeFilter: ["theme"] });
  matchMedia(dark).addEventListener("change", changed, { signal });
  signal.addEventListener("abort", () => observer.disconnect());
}
