// Words and numbers as `ellm status` writes them.

const UNITS = ["B", "Ki", "Mi", "Gi", "Ti"];

/** About three significant figures in binary units: 512B, 1.50Gi. */
export function bytes(value) {
  let unit = 0;
  while (value >= 1024 && unit < UNITS.length - 1) [value, unit] = [value / 1024, unit + 1];
  return value.toFixed(unit === 0 ? 0 : value < 10 ? 2 : value < 100 ? 1 : 0) + UNITS[unit];
}

/** A share of 1, never rounded up to 100 %; a dash for none. */
export const percent = (share) => (share == null ? "–" : share < 1 ? `${(Math.floor(share * 1000) / 10).toFixed(1)}%` : "100%");

export function ago(seconds) {
  for (const [unit, size] of [["h", 3600], ["m", 60]]) if (seconds >= size) return `${Math.floor(seconds / size)}${unit} ago`;
  return `${Math.floor(seconds)}s ago`;
}

/** The part of an engine's identity that people use. */
export const replicaName = (engineId) => engineId.slice(engineId.lastIndexOf("#") + 1);

/** The first characters of a long identity. */
export const short = (identity) => (identity.length <= 12 ? identity : identity.slice(0, 8));

export const count = (n, one, many = `${one}s`) => `${n} ${n === 1 ? one : many}`;
