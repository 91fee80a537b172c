// Starts the page: unpacks the library and the script of the page, and runs them. The
// export puts this file into the page. The page's policy allows the unpacked script by
// its hash.
{
  const { script } = JSON.parse(document.getElementById("minw-data").textContent);
  const packed = Uint8Array.from(atob(script), (letter) => letter.charCodeAt(0));
  const start = async () => {
    const stream = new Blob([packed]).stream();
    const unpacked = stream.pipeThrough(new DecompressionStream("gzip"));
    const element = document.createElement("script");
    element.textContent = await new Response(unpacked).text();
    document.body.append(element);
  };
  start().catch((error) => {
    document.body.append(`This page needs a newer browser (${error.message}).`);
  });
}
