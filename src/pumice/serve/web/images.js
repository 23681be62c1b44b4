// Images: what is wrong with a file, and how the model gets to see one.

// What is wrong with a file, if anything is. An <img> shows drawings, and as much of a broken file as
// there is; servers take neither, and so does createImageBitmap.
export async function fault(file) {
  const kinds = "PNG, JPEG, WebP and GIF can be used";
  if (!file.type.startsWith("image/")) return `is no image; ${kinds}`;
  if (file.type.startsWith("image/svg")) return "is an SVG drawing, which holds no pixels: draw it into a PNG first";
  try {
    (await createImageBitmap(file)).close();
  } catch {
    return `cannot be decoded by the browser: it is cut short or damaged, or of another kind; ${kinds}`;
  }
}

// A file that can be used, as it is sent, drawn and told of.
export async function opened(file, headers) {
  const uri = await new Promise((done) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result);
    reader.readAsDataURL(file);
  });
  const image = new Image();
  image.src = uri;
  await image.decode();
  return { uri, image, plan: await plan(image, headers) };
}

async function plan(image, headers) {
  const query = `width=${image.naturalWidth}&height=${image.naturalHeight}`;
  try {
    const response = await fetch(`/page/image-plan?${query}`, { headers });
    return response.ok ? response.json() : null;
  } catch {
    return null; // that the server is gone is told to who asks
  }
}

// The picture as the model gets it: on its canvas, cut into tiles, with the tokens it becomes.
// Its longer side has so many dots: lines between tiles must outlive being shown much smaller.
export function figure({ image, plan }, dots = 640) {
  const element = document.createElement("figure");
  const canvas = document.createElement("canvas");
  const tiled = plan?.plan;
  const [width, height] = tiled ? tiled.target : [image.naturalWidth, image.naturalHeight];
  const fit = dots / Math.max(width, height);
  const scale = tiled ? fit : Math.min(1, fit); // lines of tiles must show on the smallest picture
  canvas.width = Math.max(1, Math.round(width * scale));
  canvas.height = Math.max(1, Math.round(height * scale));
  const draw = canvas.getContext("2d");
  draw.scale(canvas.width / width, canvas.height / height);
  if (tiled) drawTiles(draw, image, tiled, scale);
  else draw.drawImage(image, 0, 0, width, height);
  element.append(canvas);
  const caption = document.createElement("figcaption");
  caption.textContent = describe(image, plan);
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", caption.textContent);
  element.append(caption);
  return element;
}

function drawTiles(draw, image, tiled, scale) {
  const [width, height] = tiled.target;
  draw.fillStyle = "#7a7669";
  draw.fillRect(0, 0, width, height);
  draw.drawImage(image, ...tiled.offset, ...tiled.resized);
  draw.strokeStyle = "#f0916b";
  draw.lineWidth = 2 / scale;
  for (let column = 0; column < tiled.grid[0]; column++)
    for (let row = 0; row < tiled.grid[1]; row++)
      draw.strokeRect(column * tiled.tile, row * tiled.tile, tiled.tile, tiled.tile);
}

function describe(image, plan) {
  const size = `${image.naturalWidth} × ${image.naturalHeight}`;
  if (!plan) return size;
  if (!plan.plan) return `${size}: ${plan.image_tokens} image tokens`;
  const { grid, tokens } = plan.plan;
  const whole = tokens.global ? `${tokens.global} of the whole, ` : "";
  return `${size}: ${grid[0]} × ${grid[1]} tiles, ${plan.image_tokens} image tokens (${whole}${tokens.tiles} of tiles, ${tokens.row_end} row ends)`;
}
