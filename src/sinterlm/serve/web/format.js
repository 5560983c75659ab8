// Numbers as people read them. A value that is not known is an en dash, never a zero.

export const UNKNOWN = "–";

/** 1234.5 -> "1,235"; below 100 with `digits` decimals. */
export function number(value, digits = 1) {
  if (value === null || !Number.isFinite(value)) return UNKNOWN;
  const decimals = Number.isInteger(value) || Math.abs(value) >= 100 ? 0 : digits;
  return value.toLocaleString("en", {
    minimumFractionDigits: decimals,
    maximumFractionDigits: decimals,
  });
}

/** Seconds as µs, ms, s, min, h or days, two to three digits. */
export function seconds(value) {
  if (value === null || !Number.isFinite(value)) return UNKNOWN;
  if (value === 0) return "0 s";
  if (value < 1e-3) return `${digits3(value * 1e6)} µs`;
  if (value < 1) return `${digits3(value * 1e3)} ms`;
  if (value < 120) return `${digits3(value)} s`;
  if (value < 7200) return `${Math.round(value / 60)} min`;
  if (value < 172800) return `${Math.round(value / 3600)} h`;
  return `${Math.round(value / 86400)} days`;
}

/** 0.845 -> "85 %". */
export function percent(fraction) {
  if (fraction === null || !Number.isFinite(fraction)) return UNKNOWN;
  return `${number(fraction * 100, fraction < 0.0995 ? 1 : 0)} %`;
}

/** Bytes in binary units. */
export function bytes(value) {
  if (value === null || !Number.isFinite(value)) return UNKNOWN;
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (value >= 1024 && unit < units.length - 1) {
    value /= 1024;
    unit += 1;
  }
  return `${number(value)} ${units[unit]}`;
}

function digits3(value) {
  return value < 10 ? value.toFixed(1).replace(/\.0$/, "") : Math.round(value).toString();
}
