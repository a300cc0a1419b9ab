// Prints the numbers of the blocks that a chain of VHD images has, as vhd-lib finds them.
//
// Arguments: the images, the uppermost first.
const fs = require('node:fs/promises')
const { VhdSynthetic } = require('vhd-lib/Vhd/VhdSynthetic.js')

const handler = {
  openFile: path => fs.open(path, 'r'),
  closeFile: file => file.close(),
  read: (file, buffer, position) => file.read(buffer, 0, buffer.length, position),
  getSize: async file => (await (typeof file === 'string' ? fs.stat(file) : file.stat())).size,
}

async function main() {
  const opened = await VhdSynthetic.open(handler, process.argv.slice(2).reverse(), {
    checkSecondFooter: false,
  })
  const disk = opened.value
  await disk.readBlockAllocationTable()
  const blocks = []
  for (let block = 0; block * disk.header.blockSize < disk.footer.currentSize; block++) {
    if (disk.containsBlock(block)) {
      blocks.push(block)
    }
  }
  console.log(JSON.stringify(blocks))
  await opened.dispose()
}

main().catch(error => {
  console.error(error)
  process.exitCode = 1
})
