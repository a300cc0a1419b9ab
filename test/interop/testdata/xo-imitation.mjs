// Acts like @vates/nbd-client 3.5.0 for ends_test.go where that cannot be had:
// after an error or the end of a connection it sends NBD_CMD_DISC on it, waits,
// connects again and repeats the reads that were not answered. Nothing listens
// to the errors of a socket that is connected, so that writing to one that has
// ended ends the process.
import { once } from 'node:events'
import { connect as connectTcp } from 'node:net'
import { connect as connectTls } from 'node:tls'
import { setTimeout as sleep } from 'node:timers/promises'

const attempts = 5

// take reads from a socket. Nothing is read while nobody waits for bytes.
function take(socket, length) {
  return new Promise((resolve, reject) => {
    const settle = (how, value) => {
      socket.off('readable', look)
      socket.off('end', end)
      how(value)
    }
    const end = () => settle(reject, new Error('stream has ended'))
    const look = () => {
      const bytes = socket.read(length)
      if (bytes?.length === length) {
        settle(resolve, bytes)
      } else if (bytes !== null || socket.readableEnded) {
        end()
      }
    }
    socket.on('readable', look)
    socket.on('end', end)
    look()
  })
}

// Connection is one connection, and the reads in flight on it.
class Connection {
  #settings
  #wait
  #socket
  #pending = new Map() // cookie → read
  #cookie = 0n
  #reconnecting
  #receiving = false

  constructor(settings, wait) {
    this.#settings = settings
    this.#wait = wait
  }

  async connect() {
    const { address, port, exportname, cert } = this.#settings
    this.#socket = connectTcp(port, address)
    await once(this.#socket, 'connect')
    await take(this.#socket, 18)
    this.#socket.write(Buffer.from([0, 0, 0, 1]))
    if (cert !== undefined) {
      this.#option(5, '')
      await take(this.#socket, 20)
      this.#socket = connectTls({ socket: this.#socket, rejectUnauthorized: false, cert })
      await once(this.#socket, 'secureConnect')
    }
    this.#option(1, exportname)
    this.exportSize = (await take(this.#socket, 134)).readBigUInt64BE(0)
    this.#receiving = false
  }

  #option(option, data) {
    const header = Buffer.alloc(16)
    header.write('IHAVEOPT')
    header.writeUInt32BE(option, 8)
    header.writeUInt32BE(Buffer.byteLength(data), 12)
    this.#socket.write(Buffer.concat([header, Buffer.from(data)]))
  }

  #request(command, offset, length) {
    const request = Buffer.alloc(28)
    request.writeUInt32BE(0x25609513, 0)
    request.writeUInt16BE(command, 6)
    request.writeBigUInt64BE(++this.#cookie, 8)
    request.writeBigUInt64BE(offset, 16)
    request.writeUInt32BE(length, 24)
    return request
  }

  // receive takes replies as long as reads wait for them. After an error it takes
  // no more from this socket.
  async #receive(socket) {
    if (this.#receiving) {
      return
    }
    this.#receiving = true
    try {
      await this.#receiveReplies(socket)
      this.#receiving = false
    } catch (error) {
      for (const { reject } of this.#pending.values()) {
        reject(error)
      }
      this.#pending.clear()
    }
  }

  async #receiveReplies(socket) {
    do {
      const header = await take(socket, 16)
      const errno = header.readUInt32BE(4)
      if (errno !== 0) {
        throw new Error(`error ${errno}`)
      }
      const cookie = header.readBigUInt64BE(8)
      const { length, resolve } = this.#pending.get(cookie)
      const data = await take(socket, length)
      this.#pending.delete(cookie)
      resolve(data)
    } while (this.#pending.size > 0)
  }

  async read(index, size) {
    const offset = BigInt(index) * BigInt(size)
    const left = Number(this.exportSize - offset)
    const length = Math.min(size, left)
    for (let attempt = 1; ; attempt++) {
      try {
        await this.#reconnecting
        return await new Promise((resolve, reject) => {
          const request = this.#request(0, offset, length)
          this.#pending.set(this.#cookie, { length, resolve, reject })
          this.#socket.write(request)
          this.#receive(this.#socket)
        })
      } catch (error) {
        if (attempt === attempts) {
          throw error
        }
        this.#reconnecting ??= this.#reconnect().finally(() => (this.#reconnecting = undefined))
        await this.#reconnecting
      }
    }
  }

  async #reconnect() {
    this.disconnect()
    for (let attempt = 1; ; attempt++) {
      await sleep(this.#wait)
      try {
        return await this.connect()
      } catch (error) {
        if (attempt === attempts) {
          throw error
        }
        await sleep(1000)
      }
    }
  }

  disconnect() {
    const request = this.#request(2, 0n, 0)
    this.#socket.end(request)
  }
}

export default class MultiConnection {
  #connections

  constructor([settings], { nbdConcurrency, waitBeforeReconnect }) {
    this.#connections = Array.from({ length: nbdConcurrency }, () => new Connection(settings, waitBeforeReconnect))
  }

  get exportSize() {
    return this.#connections[0].exportSize
  }

  async connect() {
    for (const connection of this.#connections) {
      await connection.connect()
    }
  }

  async *readBlocks(wanted) {
    const ahead = []
    let next = 0
    for (const { index, size } of wanted()) {
      if (ahead.length === 16) {
        yield ahead.shift()
      }
      const promise = this.#connections[next++ % this.#connections.length].read(index, size)
      promise.catch(() => {})
      ahead.push(promise)
    }
    while (ahead.length > 0) {
      yield ahead.shift()
    }
  }

  async disconnect() {
    for (const connection of this.#connections) {
      connection.disconnect()
    }
  }
}
