// Drives Xen Orchestra's NBD client for xo_test.go. The first line of standard
// input is a JSON object that says what to do, the last line of standard output
// one that says what came of it.
import { open } from 'node:fs/promises'
import { createInterface } from 'node:readline'
import NbdClient from '@vates/nbd-client'
import MultiNbdClient from '@vates/nbd-client/multi.mjs'

const blockSize = 2 * 1024 * 1024
const lines = createInterface({ input: process.stdin })[Symbol.asyncIterator]()
const { what, settings, connections, waitBeforeReconnect, out } = JSON.parse((await lines.next()).value)

// blocks are the numbers of the disk's blocks, up or shuffled in a fixed way.
function blocks(size, shuffled) {
  const n = Math.ceil(size / blockSize)
  const all = Array.from({ length: n }, (_, i) => i)
  return shuffled ? all.map(i => [(i * 2654435761) % 1000003, i]).sort((a, b) => a[0] - b[0]).map(([, i]) => i) : all
}

// pull reads every block over several connections and writes each to its place.
// With a pause it stops in the middle, says so, and waits for the end of its input.
async function pull({ shuffled = false, pause = false }) {
  const client = new MultiNbdClient([settings], { nbdConcurrency: connections, waitBeforeReconnect })
  await client.connect()
  const size = Number(client.exportSize)
  const file = await open(out, 'w')
  const order = blocks(size, shuffled)
  const middle = pause ? Math.floor(order.length / 2) : order.length
  await copy(client, file, order.slice(0, middle))
  if (pause) {
    console.log('middle')
    await lines.next()
    await copy(client, file, order.slice(middle))
  }
  await file.close()
  await client.disconnect()
  return { size }
}

async function copy(client, file, order) {
  const wanted = function* () {
    for (const index of order) {
      yield { index, size: blockSize }
    }
  }
  let next = 0
  for await (const data of client.readBlocks(wanted)) {
    await file.write(data, 0, data.length, order[next++] * blockSize)
  }
}

async function map() {
  const client = new NbdClient(settings)
  await client.connect()
  const extents = await client.getMap()
  await client.disconnect()
  return { size: Number(client.exportSize), extents }
}

const todo = {
  pull: () => pull({}),
  shuffled: () => pull({ shuffled: true }),
  paused: () => pull({ pause: true }),
  map,
}
console.log(JSON.stringify(await todo[what]()))
process.stdin.destroy()
