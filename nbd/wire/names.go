package wire

import (
	"fmt"
	"strings"
)

// Names as the protocol text spells them, for logs and error messages.

var optionNames = map[Option]string{
	OptExportName: "NBD_OPT_EXPORT_NAME", OptAbort: "NBD_OPT_ABORT", OptList: "NBD_OPT_LIST",
	OptPeekExport: "NBD_OPT_PEEK_EXPORT", OptStartTLS: "NBD_OPT_STARTTLS", OptInfo: "NBD_OPT_INFO",
	OptGo: "NBD_OPT_GO", OptStructuredReply: "NBD_OPT_STRUCTURED_REPLY",
	OptListMetaContext: "NBD_OPT_LIST_META_CONTEXT", OptSetMetaContext: "NBD_OPT_SET_META_CONTEXT",
	OptExtendedHeaders: "NBD_OPT_EXTENDED_HEADERS",
}

func (o Option) String() string { return name(optionNames, o, "NBD_OPT") }

var optionReplyNames = map[OptionReply]string{
	RepAck: "NBD_REP_ACK", RepServer: "NBD_REP_SERVER", RepInfo: "NBD_REP_INFO",
	RepMetaContext: "NBD_REP_META_CONTEXT", RepErrUnsup: "NBD_REP_ERR_UNSUP",
	RepErrPolicy: "NBD_REP_ERR_POLICY", RepErrInvalid: "NBD_REP_ERR_INVALID",
	RepErrPlatform: "NBD_REP_ERR_PLATFORM", RepErrTLSReqd: "NBD_REP_ERR_TLS_REQD",
	RepErrUnknown: "NBD_REP_ERR_UNKNOWN", RepErrShutdown: "NBD_REP_ERR_SHUTDOWN",
	RepErrBlockSizeReqd: "NBD_REP_ERR_BLOCK_SIZE_REQD", RepErrTooBig: "NBD_REP_ERR_TOO_BIG",
	RepErrExtHeaderReqd: "NBD_REP_ERR_EXT_HEADER_REQD",
}

func (r OptionReply) String() string { return name(optionReplyNames, r, "NBD_REP") }

var infoNames = map[Info]string{
	InfoExport: "NBD_INFO_EXPORT", InfoName: "NBD_INFO_NAME",
	InfoDescription: "NBD_INFO_DESCRIPTION", InfoBlockSize: "NBD_INFO_BLOCK_SIZE",
}

func (i Info) String() string { return name(infoNames, i, "NBD_INFO") }

var commandNames = map[Command]string{
	CmdRead: "NBD_CMD_READ", CmdWrite: "NBD_CMD_WRITE", CmdDisc: "NBD_CMD_DISC",
	CmdFlush: "NBD_CMD_FLUSH", CmdTrim: "NBD_CMD_TRIM", CmdCache: "NBD_CMD_CACHE",
	CmdWriteZeroes: "NBD_CMD_WRITE_ZEROES", CmdBlockStatus: "NBD_CMD_BLOCK_STATUS",
	CmdResize: "NBD_CMD_RESIZE",
}

func (c Command) String() string { return name(commandNames, c, "NBD_CMD") }

var chunkNames = map[ChunkType]string{
	ChunkNone: "NBD_REPLY_TYPE_NONE", ChunkOffsetData: "NBD_REPLY_TYPE_OFFSET_DATA",
	ChunkOffsetHole: "NBD_REPLY_TYPE_OFFSET_HOLE", ChunkBlockStatus: "NBD_REPLY_TYPE_BLOCK_STATUS",
	ChunkBlockStatusExt: "NBD_REPLY_TYPE_BLOCK_STATUS_EXT", ChunkError: "NBD_REPLY_TYPE_ERROR",
	ChunkErrorOffset: "NBD_REPLY_TYPE_ERROR_OFFSET",
}

func (t ChunkType) String() string { return name(chunkNames, t, "NBD_REPLY_TYPE") }

func (f ChunkFlags) String() string { return flagNames(uint64(f), "DONE") }

var errnoNames = map[Errno]string{
	Success: "success", EPERM: "NBD_EPERM", EIO: "NBD_EIO", ENOMEM: "NBD_ENOMEM",
	EINVAL: "NBD_EINVAL", ENOSPC: "NBD_ENOSPC", EOVERFLOW: "NBD_EOVERFLOW",
	ENOTSUP: "NBD_ENOTSUP", ESHUTDOWN: "NBD_ESHUTDOWN",
}

func (e Errno) String() string { return name(errnoNames, e, "NBD_E") }

func name[T ~uint16 | ~uint32](names map[T]string, v T, kind string) string {
	if s, ok := names[v]; ok {
		return s
	}
	return fmt.Sprintf("%s(%d)", kind, uint64(v))
}

func (f HandshakeFlags) String() string {
	return flagNames(uint64(f), "FIXED_NEWSTYLE", "NO_ZEROES")
}

func (f ClientFlags) String() string {
	return flagNames(uint64(f), "C_FIXED_NEWSTYLE", "C_NO_ZEROES")
}

func (f TransmissionFlags) String() string {
	return flagNames(uint64(f), "HAS_FLAGS", "READ_ONLY", "SEND_FLUSH", "SEND_FUA", "ROTATIONAL",
		"SEND_TRIM", "SEND_WRITE_ZEROES", "SEND_DF", "CAN_MULTI_CONN", "SEND_RESIZE", "SEND_CACHE",
		"SEND_FAST_ZERO", "BLOCK_STATUS_PAYLOAD")
}

func (f CommandFlags) String() string {
	return flagNames(uint64(f), "FUA", "NO_HOLE", "DF", "REQ_ONE", "FAST_ZERO", "PAYLOAD_LEN")
}

// flagNames joins the names of the bits that are set, lowest first; bits
// without a name are shown together as a number.
func flagNames(v uint64, names ...string) string {
	var set []string
	for i, n := range names {
		if v&(1<<i) != 0 {
			set = append(set, n)
			v &^= 1 << i
		}
	}
	if v != 0 {
		set = append(set, fmt.Sprintf("%#x", v))
	}
	if set == nil {
		return "0"
	}
	return strings.Join(set, "|")
}
