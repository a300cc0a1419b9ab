package wire

// HandshakeFlags are the capabilities of the server in the greeting, section
// "Handshake flags".
type HandshakeFlags uint16

// The handshake flags.
const (
	FlagFixedNewstyle HandshakeFlags = 1 << 0 // unknown options are refused, not fatal
	FlagNoZeroes      HandshakeFlags = 1 << 1 // the client may ask to omit the zeroes after EXPORT_NAME
)

// ClientFlags is the client's answer to the greeting, section "Client flags".
type ClientFlags uint32

// The client flags.
const (
	FlagCFixedNewstyle ClientFlags = 1 << 0
	FlagCNoZeroes      ClientFlags = 1 << 1
)

// TransmissionFlags says what can be done with an export, section
// "Transmission flags".
type TransmissionFlags uint16

// The transmission flags.
const (
	FlagHasFlags           TransmissionFlags = 1 << 0
	FlagReadOnly           TransmissionFlags = 1 << 1
	FlagSendFlush          TransmissionFlags = 1 << 2
	FlagSendFUA            TransmissionFlags = 1 << 3
	FlagRotational         TransmissionFlags = 1 << 4
	FlagSendTrim           TransmissionFlags = 1 << 5
	FlagSendWriteZeroes    TransmissionFlags = 1 << 6
	FlagSendDF             TransmissionFlags = 1 << 7
	FlagCanMultiConn       TransmissionFlags = 1 << 8
	FlagSendResize         TransmissionFlags = 1 << 9
	FlagSendCache          TransmissionFlags = 1 << 10
	FlagSendFastZero       TransmissionFlags = 1 << 11
	FlagBlockStatusPayload TransmissionFlags = 1 << 12
)

// CommandFlags modify one request, section "Command flags".
type CommandFlags uint16

// The command flags.
const (
	CmdFlagFUA        CommandFlags = 1 << 0
	CmdFlagNoHole     CommandFlags = 1 << 1
	CmdFlagDF         CommandFlags = 1 << 2
	CmdFlagReqOne     CommandFlags = 1 << 3
	CmdFlagFastZero   CommandFlags = 1 << 4
	CmdFlagPayloadLen CommandFlags = 1 << 5
)
