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

// Connection is one connection, and the reads in flight on it.
class Connection {
  #settings
  #wait
  #socket
  #received = Buffer.alloc(0)
  #waiting // for bytes
  #pending = new Map() // cookie → read
  #cookie = 0n
  #reconnecting

  constructor(settings, wait) {
    this.#settings = settings
    this.#wait = wait
  }

  async connect() {
    const { address, port, exportname, cert } = this.#settings
    this.#use(connectTcp(port, address))
    await once(this.#socket, 'connect')
    await this.#take(18)
    this.#socket.write(Buffer.from([0, 0, 0, 1]))
    if (cert !== undefined) {
      this.#option(5, '')
      await this.#take(20)
      const plain = this.#socket
      plain.removeAllListeners('data')
      plain.removeAllListeners('end')
      this.#use(connectTls({ socket: plain, rejectUnauthorized: false, cert }))
      await once(this.#socket, 'secureConnect')
    }
    this.#option(1, exportname)
    this.exportSize = (await this.#take(134)).readBigUInt64BE(0)
    this.#receive(this.#socket).catch(error => {
      for (const { reject } of this.#pending.values()) {
        reject(error)
      }
      this.#pending.clear()
    })
  }

  #use(socket) {
    this.#socket = socket
    this.#received = Buffer.alloc(0)
    socket.on('data', data => {
      this.#received = Buffer.concat([this.#received, data])
      this.#waiting?.check()
    })
    socket.on('end', () => this.#waiting?.reject(new Error('stream has ended')))
  }

  #take(length) {
    return new Promise((resolve, reject) => {
      const check = () => {
        if (this.#received.length >= length) {
          this.#waiting = undefined
          const taken = this.#received.subarray(0, length)
          this.#received = this.#received.subarray(length)
          resolve(taken)
        }
      }
      this.#waiting = { check, reject }
      check()
    })
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

  async #receive(socket) {
    while (socket === this.#socket) {
      const header = await this.#take(16)
      const errno = header.readUInt32BE(4)
      if (errno !== 0) {
        throw new Error(`error ${errno}`)
      }
      const cookie = header.readBigUInt64BE(8)
      const { length, resolve } = this.#pending.get(cookie)
      const data = await this.#take(length)
      this.#pending.delete(cookie)
      resolve(data)
    }
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
